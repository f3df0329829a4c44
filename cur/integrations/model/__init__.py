"""A model: opening it, its blocks and layers, running it, its neurons and its size.

What a model does on text is measured by the room above; nothing here knows of plans or reports. Imports `files` and
`nn`.
"""
