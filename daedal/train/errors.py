"""What is wrong with training data, in the tree of `daedal.errors`. Each message names the file, and the row in it."""

from daedal.errors import DaedalError


class DataError(DaedalError):
    """A file of text or a tokenised dataset cannot be used as it is, or does not fit what it is used with."""
