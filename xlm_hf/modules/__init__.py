"""Torch building blocks that every family may import; they import nothing of the core above them.

An exported repository carries the files of this folder that its family uses. So each file imports only the standard
library, torch, transformers and files of this folder.
"""
