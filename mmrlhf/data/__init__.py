"""From files to batches: readers -> PreferenceGroup -> collate -> GroupBatch.

    groups = read_groups("dpo_pairs.jsonl").groups                 # any of the published formats
    dataset = PreferenceDataset(groups, Encoder(processor, root=…))  # tokens, segment weights, pixels
    batch = collate([dataset[0], dataset[1]])                      # flat, unpadded

Files are untrusted: they run no code, leave no data root, open no socket, and their size is bounded before it is
spent. What cannot be used is a `BadRow` that names its file and line; nothing is dropped uncounted.
Submodules are imported by name (`from mmrlhf.data.readers import read_groups`); importing this package does nothing.
"""
