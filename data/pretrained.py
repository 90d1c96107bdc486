"""
Weights that come and go: Hugging Face folders in and out (GPT.from_pretrained, GPT.save_pretrained), and load_model,
by which every script starts from wherever --init_from points. A family of models is flags of ours, its names for the
flags that it leaves open, and its names for the weights. Nothing of a folder is run: JSON and safetensors are read.
"""
import json, os, re
from pathlib import Path
import torch
import torch.nn as nn
from bpe import SPECIAL, Tokenizer
from configurator import load_checkpoint, replacing
from model import GPT, GPTConfig, RewardModel

LLAMA = dict(vocab_size='vocab_size', block_size='max_position_embeddings', n_layer='num_hidden_layers',
             n_head='num_attention_heads', n_kv_head='num_key_value_heads', head_dim='head_dim', n_embd='hidden_size',
             n_hidden='intermediate_size', norm_eps='rms_norm_eps', rope_base='rope_theta',
             tie_weights='tie_word_embeddings')
GPT2 = dict(vocab_size='vocab_size', block_size='n_positions', n_layer='n_layer', n_head='n_head', n_embd='n_embd',
            n_hidden='n_inner', norm_eps='layer_norm_epsilon', tie_weights='tie_word_embeddings')
MISTRAL = LLAMA | dict(window='sliding_window')
MIXTRAL = MISTRAL | dict(n_expert='num_local_experts', n_expert_active='num_experts_per_tok')
FAMILIES = {  # model_type: (flags where its config.json says nothing, that file's names for flags)
    'gpt2': (dict(norm='layernorm', norm_eps=1e-5, pos='learned', bias=True, tie_weights=True), GPT2),
    'llama': ({}, LLAMA), 'qwen2': (dict(qkv_bias=True), LLAMA), 'qwen3': (dict(qk_norm=True), LLAMA),
    'mistral': (dict(window=4096), MISTRAL), 'mixtral': (dict(norm_eps=1e-5, rope_base=1e6), MIXTRAL)}
KNOWN = (  # what else may stand in a config.json: keys that change nothing here, and those set to what we do anyway
    r'(model_type|architectures|(torch_)?dtype|transformers.*|_name_or_path|task_specific_params|use_cache|n_ctx|'
    r'\w+_token_id|\w+_dropout|\w+_pdrop|summary_\w+|initializer_range|n_special|predict_special_tokens|pretraining_tp|'
    r'is_llama_config|rope_(scaling|parameters)|sliding_window|max_window_layers|(output_)?router_\w+|reorder_\w+)=.*|'
    r'(attention_bias|mlp_bias|use_sliding_window|use_mrope|rope_interleaved|add_cross_attention|is_encoder_decoder|'
    r'scale_attn_by_inverse_layer_idx)=False|scale_attn_weights=True|hidden_act=silu|activation_function=gelu(_new)?|'
    r"(rope_)?type=default|partial_rotary_factor=1(\.0)?|layer_types=\[('full_attention'(, )?)*\]")
WEIGHTS = {  # of all but gpt2, whose names are ours; where there are several, ours is those stacked
    'wte': 'model.embed_tokens', 'ln_f': 'model.norm', 'lm_head': 'lm_head', 'ln_1': 'input_layernorm',
    'ln_2': 'post_attention_layernorm', 'attn.c_attn': 'self_attn.q_proj self_attn.k_proj self_attn.v_proj',
    'attn.c_proj': 'self_attn.o_proj', 'attn.q_norm': 'self_attn.q_norm', 'attn.k_norm': 'self_attn.k_norm',
    'mlp.c_fc': 'mlp.gate_proj mlp.up_proj', 'mlp.c_proj': 'mlp.down_proj', 'mlp.router': 'block_sparse_moe.gate',
    'mlp.experts.c_fc': 'block_sparse_moe.experts.{0}.w1 block_sparse_moe.experts.{0}.w3',
    'mlp.experts.c_proj': 'block_sparse_moe.experts.{0}.w2'}

def config_from(d, **overrides):
    """The GPTConfig of a config.json. ValueError naming what is not known here and may change the result."""
    if d.get('model_type') not in FAMILIES:
        raise ValueError(f"model_type {d.get('model_type')!r} is not one of {', '.join(FAMILIES)}")
    (flags, names), fields = FAMILIES[d['model_type']], GPTConfig.__dataclass_fields__
    d = d | (d.get('rope_scaling') or {}) | (d.get('rope_parameters') or {})
    odd = [f'{k}={v}' for k, v in d.items() if k not in names.values() and not re.fullmatch(KNOWN, f'{k}={v}', re.S)]
    if odd:
        raise ValueError(f'not known here, so that its results might differ: {", ".join(odd)}')
    flags = dict.fromkeys(names, 0) | dict(norm_eps=1e-6, rope_base=1e4, tie_weights=False, window=0) | flags
    flags |= {flag: fields[flag].type(d[k] or 0) for flag, k in names.items() if k in d}
    if d['model_type'] == 'gpt2':
        flags['mlp'] = 'gelu' if d.get('activation_function') == 'gelu' else 'gelu_tanh'
    c = GPTConfig(**flags | {'window': min(flags['window'], flags['block_size'])} | overrides)
    if c.n_expert_active == 1 < c.n_expert:
        raise ValueError('n_expert_active=1: the gate of a single expert is 1 in Mixtral, and here its probability')
    return c

def named_parts(model, kind):
    """{name in a file of the family: that weight, a view of ours}"""
    c, parts = model.config, {}
    for name, p in model.named_parameters():
        stem, leaf = name.rsplit('.', 1)
        number = re.findall(r'\.(\d+)', stem)                         # of the layer, of the expert
        if kind == 'gpt2':                                            # which holds a block's matrices transposed
            name = name if stem == 'lm_head' else f'transformer.{name}'
            parts[name] = p.T if number and p.dim() == 2 else p
            continue
        names = WEIGHTS[re.sub(r'^h\.\d+\.|\.\d+', '', stem)].format(*number[1:]).split()
        qkv = [n * c.head_dim for n in (c.n_head, c.n_kv_head, c.n_kv_head)]
        for theirs, part in zip(names, p.split(qkv if len(names) == 3 else len(p) // len(names))):
            parts[f'model.layers.{number[0]}.{theirs}.{leaf}' if number else f'{theirs}.{leaf}'] = part
    return parts

def hub_folder(source):
    """The folder `source`, or that of the model with this name on huggingface.co, fetched if it is not here yet."""
    try:
        if not os.path.isdir(source):
            from huggingface_hub import snapshot_download
            source = snapshot_download(source, allow_patterns=['config.json', 'model*.safetensors*', 'tokenizer.json'])
        return source
    except Exception as e:
        raise ValueError(f'{source} is no folder here, and huggingface_hub cannot fetch it ({type(e).__name__}: {e}); '
                         'give a folder that holds its config.json, model.safetensors and tokenizer.json') from e

def load_pretrained(source, dtype=None, **overrides):
    """The GPT in a Hugging Face folder or of a name on huggingface.co, in the file's dtype if none is given; overrides
    are flags that change no weight: dropout, attn and, but for learned positions, block_size. Only config.json and
    safetensors are read. ValueError, before the memory of the weights is taken, where keys, names, shapes or dtypes
    are not what they should be."""
    from safetensors import safe_open
    folder, dtypes = hub_folder(source), {'F32': torch.float32, 'F16': torch.float16, 'BF16': torch.bfloat16}
    read = lambda name: json.loads(Path(folder, name).read_text('utf-8'))
    try:
        d, inside, index = read('config.json'), sorted(os.listdir(folder)), 'model.safetensors.index.json'
        c, kind, shards = config_from(d, **overrides), d['model_type'], ['model.safetensors']
        if shards[0] not in inside and index in inside:
            shards = sorted(set(read(index)['weight_map'].values()))
        if not all(shard in inside and shard.endswith('.safetensors') for shard in shards):
            raise ValueError(f'no {", ".join(shards)} in it, and no other weights are read ({", ".join(inside)})')
        held = {name: file.get_slice(name) for shard in shards for file in [safe_open(Path(folder, shard), 'pt')]
                for name in file.keys() if not re.search(r'\.attn\.(masked_)?bias$|\.inv_freq$', name)}  # no weights
        if kind == 'gpt2':                                            # whose published names lack the prefix
            held = {re.sub(r'^(?=h\.|w|ln_f)', 'transformer.', name): tensor for name, tensor in held.items()}
        twin = held.pop('lm_head.weight', None) if c.tie_weights else None  # some files hold a tied head too
        if c.n_layer * max(1, c.n_expert) > len(held):
            raise ValueError(f'{len(held)} tensors are too few for {c.n_layer} layers of {c.n_expert} experts')
        with torch.device('meta'):
            model = GPT(c)
        want = {name: list(part.shape) for name, part in named_parts(model, kind).items()}
        have = {name: tensor.get_shape() for name, tensor in held.items()}
        found = {tensor.get_dtype() for tensor in held.values()}
        odd = [f'dtype {name} is none of {", ".join(dtypes)}' for name in sorted(found - dtypes.keys())]
        odd += [f'{name} is {have.get(name, "missing")} and should be {want.get(name, "absent")}'
                for name in sorted(have | want) if have.get(name) != want.get(name)]
        if odd:
            raise ValueError('; '.join(odd[:4]) + f'; and {len(odd) - 4} more' * (len(odd) > 4))
    except Exception as e:
        raise ValueError(f'{folder}: {e}' if type(e) is ValueError else f'{folder}: {type(e).__name__}: {e}') from e
    model = model.to(dtype or (dtypes[found.pop()] if len(found) == 1 else torch.float32)).to_empty(device='cpu')
    if c.tie_weights:
        model.lm_head.weight = model.wte.weight
    for moe in model.moes.values():
        moe.bias is None or moe.bias.zero_()  # no file has it
    with torch.no_grad():
        for name, part in named_parts(model, kind).items():
            part.copy_(held[name][:])
    if twin and not torch.equal(twin[:].to(model.wte.weight), model.wte.weight):
        raise ValueError(f'{folder}: tie_word_embeddings=True, but lm_head.weight is not the embedding')
    return model

def save_pretrained(model, folder, tokenizer=None):
    """Write a folder that AutoModelForCausalLM and, with a tokenizer, AutoTokenizer open. ValueError naming the flags
    that no family has."""
    from safetensors.torch import save
    c, special = model.config, tokenizer.special if tokenizer else {}
    kind = ('gpt2' if c.pos == 'learned' else 'mixtral' if c.n_expert else 'qwen3' if c.qk_norm else
            'qwen2' if c.qkv_bias else 'mistral' if c.window or c.n_embd % c.n_head else 'llama')  # whose heads divide
    about = {'model_type': kind, **{name: getattr(c, flag) for flag, name in FAMILIES[kind][1].items()}}
    about |= {'activation_function': 'gelu' if c.mlp == 'gelu' else 'gelu_new'} if kind == 'gpt2' else {}
    about |= {'sliding_window': c.window or None} if 'sliding_window' in about else {}
    again = vars(config_from(about, dropout=c.dropout, attn=c.attn))
    free = ('bias', 'qkv_bias', 'rope_base') * (kind == 'gpt2') + ('n_expert_active', 'moe_every') * (not c.n_expert)
    free += ('moe_balance',) * (not c.n_expert or c.moe_balance != 'bias')  # which is of training alone, but for 'bias'
    odd = [f'{flag}={value!r}' for flag, value in vars(c).items() if value != again[flag] and flag not in free]
    if odd:
        raise ValueError(f'no Hugging Face family has {", ".join(odd)}; the nearest is {kind}')
    if kind == 'qwen2' and tokenizer and (tokenizer.pattern, tokenizer.normalizer) != ('qwen2', 'NFC'):
        raise ValueError("transformers cuts text for a qwen2 (qkv_bias=True) as Qwen's tokenizer does, not as this")
    tensors = {name: part.detach().cpu().contiguous() for name, part in named_parts(model, kind).items()}
    if kind == 'gpt2':                                                # always has biases
        tensors = {name.replace('weight', 'bias'): t.new_zeros(t.shape[-1]) for name, t in tensors.items()
                   if '.h.' in name or '.ln_f.' in name} | tensors
    about |= {'architectures': ['GPT2LMHeadModel' if kind == 'gpt2' else f'{kind.title()}ForCausalLM'],
              'torch_dtype': str(model.wte.weight.dtype).removeprefix('torch.'), 'bos_token_id': None,
              'eos_token_id': [special[name] for name in ('<|endoftext|>', '<|end|>') if name in special] or None,
              'pad_token_id': special.get('<|pad|>')}
    files, named = {'config.json': about}, {'eos_token': '<|endoftext|>', 'pad_token': '<|pad|>'}
    if tokenizer:
        files |= {'tokenizer.json': tokenizer.to_dict(), 'tokenizer_config.json': {
            'tokenizer_class': 'PreTrainedTokenizerFast', 'clean_up_tokenization_spaces': False,
            'model_max_length': c.block_size, **{key: name for key, name in named.items() if name in special}}}
    files = {name: json.dumps(content, ensure_ascii=False, indent=1).encode() for name, content in files.items()}
    os.makedirs(folder, exist_ok=True)
    for name, content in {'model.safetensors': save(tensors, {'format': 'pt'}), **files}.items():
        with replacing(os.path.join(folder, name)) as f:
            f.write(content)

def load_model(source, config, tok=None):
    """(GPT, Tokenizer) of 'scratch', by the settings and for the tokenizer given, or of a checkpoint (a dict), a
    run's folder, a Hugging Face folder or hub name, whose architecture then stands, but for dropout and attn.
    ValueError where that one's tokenizer is not the one given."""
    if source == 'scratch':
        flags = {k: config[k] for k in GPTConfig.__dataclass_fields__ if k in config and k != 'vocab_size'}
        torch.manual_seed(config['seed'])
        return GPT(GPTConfig(vocab_size=tok.vocab_size, **flags)), tok
    flags = {k: config[k] for k in ('dropout', 'attn') if k in config}
    found = lambda name: os.path.exists(os.path.join(source, name))
    if isinstance(source, dict) or found('ckpt.pt') or not found('config.json') and (
            os.path.exists(source) or source == config.get('out_dir')):
        checkpoint = source if isinstance(source, dict) else load_checkpoint(source)
        if checkpoint.get('stage') == 'reward':
            raise ValueError(f'{source}: a reward model judges, it does not speak; give it to --reward_model')
        own = Tokenizer.from_dict(checkpoint['tokenizer'])
        model = GPT(GPTConfig(**{**checkpoint['model_args'], **flags}))
        model.load_state_dict(checkpoint['model'])
    else:
        folder = hub_folder(source)
        file = os.path.join(folder, 'tokenizer.json')
        own = Tokenizer.load(file) if tok is None or os.path.exists(file) else tok
        model = GPT.from_pretrained(folder, torch.float32, **flags)
        if own.vocab_size > model.config.vocab_size:
            raise ValueError(f'{file}: {own.vocab_size} tokens, but the model has rows for {model.config.vocab_size}')
    if tok is not None and tok.fingerprint != own.fingerprint:
        raise ValueError(f'the data has another tokenizer ({tok.vocab_size} tokens) than the model ({own.vocab_size}); '
                         'save the model\'s as a tokenizer.json and prepare the data with --tokenizer=FILE')
    return model, own

def resize_vocab(model, n):
    """Make room for n tokens, if there is less: new rows of embedding and head are the mean of the old ones."""
    for layer in (model.wte, model.lm_head):
        old = layer.weight.data
        layer.weight = nn.Parameter(torch.cat((old, old.mean(0, keepdim=True).expand(max(0, n - len(old)), -1))))
    model.lm_head.weight = model.wte.weight if model.config.tie_weights else model.lm_head.weight
    model.config.vocab_size = model.wte.num_embeddings = model.lm_head.out_features = len(model.wte.weight)

def load_chat_model(source, config):
    """load_model for the stages after training: without dropout unless `config` has one, with the special tokens of
    chats, for which the embedding is enlarged; 'scratch' is a model of bytes. ValueError for the folder that the run is
    to write to: what it starts from, and goes back to where it is resumed, would be lost."""
    if isinstance(source, str) and os.path.realpath(source) == os.path.realpath(config.get('out_dir', '')):
        raise ValueError(f'init_from={source!r} is the folder that the run would write to; give it another out_dir')
    model, tok = load_model(source, {'dropout': 0.0} | config, Tokenizer.byte() if source == 'scratch' else None)
    tok.add_special(SPECIAL)
    resize_vocab(model, tok.vocab_size)
    return model, tok

def load_reward_model(folder, tok):
    """The RewardModel of a run of reward.py, in eval mode. ValueError where the folder holds something else, or the
    model reads another tokenizer's ids than tok's."""
    checkpoint = load_checkpoint(folder)
    if checkpoint.get('stage') != 'reward':
        raise ValueError(f"{folder}: a {checkpoint.get('stage')} checkpoint, not a reward model; train one by reward.py")
    if Tokenizer.from_dict(checkpoint['tokenizer']).fingerprint != tok.fingerprint:
        raise ValueError(f'{folder}: the reward model has another tokenizer than the policy; train both from one base')
    model = RewardModel(GPT(GPTConfig(**checkpoint['model_args'])))
    model.load_state_dict(checkpoint['model'])
    if model.scale == 1 and model.shift == 0 and os.environ.get('RANK', '0') == '0':
        print(f'{folder}: saved before its run ended, so that its scores are not normalised; to end it: '
              f'python reward.py --init_from=resume --out_dir={folder}')
    return model.eval()
