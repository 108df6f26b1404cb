"""torch's own test suite for distributed backends, run with "mpizero" and with gloo, compared.

``run.py`` is the command; ``docs/conformance.md`` says what comes out of it.
"""
