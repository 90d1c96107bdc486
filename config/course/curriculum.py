# Curriculum (arXiv 2108.02170): from short examples to long ones, in four stages, or all of them in random order. The
# shortest quarter of the demonstrations asks for short words; whether meeting those first helps is what is asked here.
# python sft.py config/wordplay/sft.py config/course/curriculum.py --out_dir=out/random
# python sft.py config/wordplay/sft.py config/course/curriculum.py --curriculum=short_to_long --out_dir=out/short_to_long
# python configurator.py out/random out/short_to_long --metrics=response_loss,exact_match
#
# Needs out/bytes, of config/wordplay/base.py.
# Result: none yet at this length; the commands have been run for a few steps.

max_iters = 400
eval_interval = 100
test_draws = 1
