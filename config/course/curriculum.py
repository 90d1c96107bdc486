# A curriculum: short prompts first (arXiv 2405.07490), short examples first (arXiv 2108.02170), or
# a random order. Four stages; the last one, of all examples, begins after 40% of the run.
#
#     for c in none short_prompts short_examples; do
#         for s in 1 2 3; do
#             python sft.py config/wordplay/sft.py config/course/curriculum.py --curriculum=$c \
#                 --seed=$s --out_dir=out/$c-$s
#         done
#     done
#
# It needs out/bytes, made with config/wordplay/base.py.
#
# Result after 400 steps, on held-out prompts, with the seeds 1, 2 and 3:
#
#                                 random order           short prompts          short examples
#     greedy exact match          0.837, 0.835, 0.831    0.806, 0.812, 0.814    0.748, 0.751, 0.749
#     sampled exact match         0.488, 0.474, 0.491    0.475, 0.473, 0.466    0.392, 0.413, 0.403
#     response loss               0.149, 0.149, 0.146    0.157, 0.153, 0.154    0.201, 0.196, 0.200
#     greedy, of additions        0.14, 0.10, 0.10       0.06, 0.04, 0.07       0.08, 0.18, 0.14
#
# The curricula do not help here. Length selects operations: the shortest quarter is 71% or 80%
# additions. About three minutes per run on one core of a 2-core CPU with AVX-512.

max_iters = 400
eval_interval = 100
test_draws = 1
