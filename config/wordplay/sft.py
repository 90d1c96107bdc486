# Wordplay, stage 2 of 4: supervised fine-tuning on demonstrations, of which 35% are wrong.
#
#     python sft.py config/wordplay/sft.py
#
# Result on 1,000 held-out prompts; 0.65 of the demonstrations are correct:
#
#     seed                      1       2       3
#     greedy exact match    0.989   0.991   0.990
#     sampled exact match   0.637   0.635   0.646
#
# Every addition is correct. Six minutes on one core of a 2-core CPU with AVX-512.

out_dir = 'out/sft'
init_from = 'out/bytes'
max_iters = 1200
batch_size = 32                  # of similar length: a tenth less padding than with 64
gradient_accumulation_steps = 4
learning_rate = 8e-3
