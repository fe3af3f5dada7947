"""Plug-ins that put this package's accept rules into inference engines.

Each engine's file knows that engine's interface and nothing else does. An engine is never imported
before it has loaded the plug-in itself, and a version whose interface is not known is refused by
name instead of guessed at.
"""
