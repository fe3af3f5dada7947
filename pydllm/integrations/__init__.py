"""Adapters to other people's code: each module speaks the interface of one of them."""
