"""What can be asked for, as data: the fields of the configurations, each with its default and what help says of it.

The classes that check the values stand next to what they are for, in `integrations` and `healing`, and add nothing but
rules; the command line makes its options from the fields, and so must not have to load torch. Imports `_lib` alone.
"""
