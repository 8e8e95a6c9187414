import _checkout  # noqa: F401

from ser_mm.cli.detect import main

if __name__ == '__main__':
    main()
