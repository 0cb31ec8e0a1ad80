"""New weights from the training ranks to the rollout engines, once a step.

::

    send.send_weights (driver)        start ─► ┌ export bucket ─► every engine loads it ─► release bucket ┐ ─► finish
                                               └──────────────────── for every bucket ────────────────────┘
    send.WeightExporter (each rank)   gathers the shards of a bucket; shares it with the engines of its machine
    receive.ReceivedWeights (engine)  reads a bucket; at the end lists what is missing, unknown, reshaped or sent twice
    vllm_worker.SharedMemoryEngine    (workers.rollout) puts a bucket into vLLM's own layout, on CPU

The driver passes references to buckets, never weights.
"""
