"""Networks and weights that were not made here: libraries, factories, exported programs and files of weights."""
