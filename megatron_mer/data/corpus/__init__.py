"""From text to a tokenized dataset: inputs, shards, workers, and what joins them.

A job is a list of shards. Workers read, tokenize and write them on their own and leave a manifest
each; the parent appends finished shards in their order. So the result is the same for any number of
workers, and a killed job goes on with what is missing. Nothing here imports torch.
"""
