"""Plug dora-convert into other programs; each file needs the packages of its extra."""
