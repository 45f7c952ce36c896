"""Frozen weights of Linears in 8 or 4 bits: how the numbers are packed (`formats`), and the Linears that hold them
(`linear`)."""
