# A curriculum (arXiv 2108.02170): training on short examples first, in four stages, or on all of
# them in random order. The shortest quarter of the demonstrations is about short words.
#
#     python sft.py config/wordplay/sft.py config/course/curriculum.py --out_dir=out/random
#     python sft.py config/wordplay/sft.py config/course/curriculum.py \
#         --curriculum=short_to_long --out_dir=out/short_to_long
#     python assets/draw.py out/random out/short_to_long --metrics=response_loss,exact_match
#
# It needs out/bytes, made with config/wordplay/base.py.
#
# Result after 400 steps, on held-out prompts:
#
#                                      random order   short to long
#     greedy exact match                      0.827           0.745
#     sampled exact match                     0.476           0.403
#     response loss, nats per token           0.151           0.209
#     greedy exact match of additions          0.06            0.27
#
# The curriculum does not help here: the first half of the run teaches little about long words. Only
# additions, which are short, are learned sooner. Two minutes per run on one core of a 2-core CPU
# with AVX-512.

max_iters = 400
eval_interval = 100
test_draws = 1
