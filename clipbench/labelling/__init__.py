"""From image-text shards to labelled ones: `clipbench label`.

    plan      what is asked for: shards, experts, settings; against what is in the folder already
    pipeline  a window of samples through decoding, all experts, encoding
    shard     one shard: resumable, whole or not there
    run       many shards over threads, processes and machines

Importing this package is cheap.
"""
