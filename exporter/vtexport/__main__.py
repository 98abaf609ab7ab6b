"""`python -m vtexport` is the command `vtexport`."""

from vtexport.cli.main import main

if __name__ == "__main__":
    main()
