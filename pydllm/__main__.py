from pydllm.cli import main

main(prog_name="pydllm")
