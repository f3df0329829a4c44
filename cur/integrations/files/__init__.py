"""What lies on disk: JSON files, safetensors files and directories, read so that every fault is one sentence.

Directories are written whole or not at all. Nothing here builds a model. Imports the core's helpers alone.
"""
