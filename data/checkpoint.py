"""
Files that are whole or not there, and checkpoints: plain dicts of tensors and primitives, never half-written, never run
as code. The scripts know them through configurator.py.
"""
import contextlib, itertools, os, zipfile
import torch

@contextlib.contextmanager
def replacing(path, keep=None):
    """A binary file that gets its name when it is whole and on the disk. Until then the old one stands; from then
    on it has the name `keep`, if that is given."""
    try:
        with open(f'{path}.tmp', 'wb') as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        if keep and os.path.exists(path):
            try:  # a second name, so that the first one is never without a file
                os.link(path, f'{keep}.tmp')
                os.replace(f'{keep}.tmp', keep)
            except OSError:  # a file system without them
                os.replace(path, keep)
        os.replace(f'{path}.tmp', path)
    finally:
        with contextlib.suppress(OSError):
            os.remove(f'{path}.tmp')

def save_checkpoint(out_dir, checkpoint, name='ckpt.pt', final=True):
    """Write out_dir/name so that a crash at any moment leaves a whole checkpoint; the ckpt.pt before it stays as
    ckpt_prev.pt. Where the disk is full the old one stays: OSError, or a warning if this is not the final save."""
    path = os.path.join(out_dir, name)
    try:
        os.makedirs(out_dir, exist_ok=True)
        with replacing(path, keep=os.path.join(out_dir, 'ckpt_prev.pt') if name == 'ckpt.pt' else None) as f:
            torch.save(checkpoint, f)
    except (OSError, RuntimeError) as e:  # torch reports a full disk as a RuntimeError
        need = 3 * sum(t.nbytes for t in checkpoint['model'].values())  # weights and two moments
        text = f'{path} could not be saved; about {need:,} bytes are needed, and what was saved before is kept ({e})'
        if final:
            raise OSError(text) from e
        print('warning:', text)

def set_aside(out_dir):
    """Move what another run left in a folder to before.1 in it, or to the next number that is free, and say so."""
    names = [name for name in ('log.jsonl', 'curves.png', 'tensorboard', 'ckpt_prev.pt', 'ckpt_best.pt', 'ckpt.pt')
             if os.path.exists(os.path.join(out_dir, name))]
    if names and names[-1].startswith('ckpt'):
        other = next(name for i in itertools.count(1) if not os.path.exists(name := os.path.join(out_dir, f'before.{i}')))
        os.mkdir(other)
        for name in names:
            os.rename(os.path.join(out_dir, name), os.path.join(other, name))
        print(f'{out_dir} held another run, which is in {other} now')

def load_checkpoint(path, name='ckpt.pt'):
    """The checkpoint at a path or in a run's folder, on the CPU; its checksums are verified. Where a folder's
    ckpt.pt is damaged or missing ckpt_prev.pt is taken, and that is said. ValueError if neither can be read."""
    if os.path.isdir(path):
        path, previous = os.path.join(path, name), os.path.join(path, 'ckpt_prev.pt')
        try:
            return load_checkpoint(path)
        except ValueError as e:
            if not os.path.exists(previous):
                raise
            checkpoint = load_checkpoint(previous)
            print(f"{e}; taking {previous}, of step {checkpoint['step']}")
            return checkpoint
    if not os.path.exists(path):
        raise ValueError(f'{path}: no such checkpoint; train one, or name another folder')
    try:
        with zipfile.ZipFile(path) as z:
            if sum(i.file_size for i in z.infolist()) > os.path.getsize(path):
                raise ValueError('it says to be larger than it is')
            if damaged := z.testzip():
                raise ValueError(f'the checksum of {damaged} is wrong')
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)
        if not {'model', 'model_args', 'step', 'config'} <= checkpoint.keys():
            raise ValueError('it is not of nanoLLM')
        return checkpoint
    except Exception as e:
        raise ValueError(f"{path}: damaged or foreign checkpoint ({' '.join(str(e).split())[:100]})") from e
