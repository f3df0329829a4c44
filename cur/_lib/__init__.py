"""What numerical code needs of array libraries, and what every package needs of Python.

Nothing here knows of CUR. Imported by every other part of `cur`; imports nothing of it.
"""
