"""The layers, one family a file, named as in torch.nn.modules."""
