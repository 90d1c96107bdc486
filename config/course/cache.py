# What the KV cache saves: a sample of 1,500 bytes, where without it each byte has all those before it computed again.
# time python sample.py config/course/cache.py
# time python sample.py config/course/cache.py --use_cache=False
#
# Result: 2.8 s of one core with it, 31 s without (start-up taken off, 3.2 s), the same text.

out_dir = 'out/small'
num_samples = 1
max_new_tokens = 1500
