"""`python -m minicpmv.train.feedback`, for `accelerate launch -m`."""

from minicpmv.train.feedback.run import main


if __name__ == "__main__":
    main()
