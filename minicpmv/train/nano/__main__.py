"""`python -m minicpmv.train.nano --config recipes/nano/pretraining.yaml --output DIR`."""

from minicpmv.train.nano.pretrain import main


if __name__ == "__main__":  # processes that training spawns import this module too
    main()
