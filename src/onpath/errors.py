"""The one exception that means: the user can fix this."""


class UserError(ValueError):
    """Bad input, told in one sentence that names the file, line or key and says what would be right.

    The command line prints the sentence alone and exits with code 2.
    """
