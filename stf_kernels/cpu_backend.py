from .torch_backend import *  # temporary stand-in

NAME = "cpu"
