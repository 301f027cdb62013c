"""`python -m amx_tvm` is the command line."""

from amx_tvm.cli import main

if __name__ == "__main__":
    main()
