"""Errors a user can correct. Every message says the value, the rule and the remedy."""


class CatVersionError(ValueError):
    """A mistake in the input. The command line prints the message and exits with code 2."""


class ConceptError(CatVersionError):
    """A mistake in one concept. Training quarantines that concept and goes on with the others."""
