"""The same mathematics written plainly, in two ways, for the library to be measured against.

*dense*: targets of the size of the logits, a log-softmax over everything, the vocabulary head at every position, rows
padded to the block, every row in every step, every forward pass from scratch. *plain*: the same, but with logsumexp
and gather in place of the dense targets and the log-softmax. Both share the library's backbone, so that what is
compared is everything around it; a test holds that all three give the same losses and the same samples.
"""
