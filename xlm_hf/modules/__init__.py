"""Torch building blocks that every family may import, and nothing of the core above them.

A family's repository on the Hub carries the files it uses from here beside its own, so each file imports only the
standard library, torch, transformers and its neighbours in this folder.
"""
