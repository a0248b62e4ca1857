"""What options and values are called in other trainers (transformers, TRL, verl, OpenRLHF), and here."""

import difflib
from collections.abc import Iterable, Iterator, Mapping

_TABLE = """
model_name_or_path model_name pretrain base_model model.path: student.model
teacher_model_name_or_path teacher_model teacher_path: teacher.model
torch_dtype precision: student.dtype, or optim.bf16
use_peft lora_r r rank: student.lora_rank
target_modules lora_target_modules: student.lora_targets
load_in_4bit load_in_8bit use_qlora quantization_config: teacher.quantization, or student.quantization with
  student.lora_rank
fsdp fsdp_config zero_stage deepspeed: parallel.shard, layer or step
tensor_parallel_size: parallel.shard, layer or step; to sample from a model that one GPU does not hold,
  rollout.vllm: {tensor_parallel_size: …}
dataset_name dataset train_file train_files prompt_data: data.train
eval_dataset val_files validation_file: data.eval
dataset_text_field prompt_key input_key label_key column_mapping: data.columns
max_train_samples max_samples train_max_samples: data.limit
max_eval_samples val_max_samples: data.eval_limit
system_prompt system_message: data.system
apply_chat_template: data.template
chat_template: data.chat_template
learning_rate actor_learning_rate peak_lr: optim.lr
lr_scheduler_type lr_scheduler scheduler: optim.schedule
warmup_ratio warmup_steps lr_warmup_steps lr_warmup_ratio: optim.warmup, a share
max_steps total_steps total_training_steps num_steps: optim.steps
num_train_epochs epochs total_epochs num_epochs num_episodes: optim.steps; an epoch is the number of
  prompts ÷ rollout.prompts steps
adam_beta1 adam_beta2 adam_betas: optim.betas
adam_epsilon: optim.eps
l2 wd: optim.weight_decay
max_norm grad_clip gradient_clip_val clip_grad_norm clip_grad: optim.max_grad_norm
fp16: optim.bf16; float16 cannot train
amp mixed_precision: optim.bf16
per_device_train_batch_size train_batch_size batch_size gradient_accumulation_steps rollout_batch_size
  micro_batch_size micro_train_batch_size ppo_mini_batch_size: rollout.prompts, prompts a step over all
  processes; memory is optim.micro_batch_tokens
per_device_eval_batch_size eval_batch_size: rollout.batch_tokens
max_completion_length max_response_length generate_max_len max_tokens max_length response_length:
  rollout.max_new_tokens
max_prompt_length prompt_max_len: not needed: a prompt that does not fit is refused by name
num_generations n_samples_per_prompt num_samples: rollout.n
use_vllm: rollout.engine: vllm
vllm_server_base_url vllm_server_host base_url api_base: rollout.url or teacher.url
vllm_gpu_memory_utilization gpu_memory_utilization: rollout.vllm: {gpu_memory_utilization: …}
lmbda lambda student_data_fraction: not needed: every rollout is the student's own, which is lmbda 1
seq_kd: method.writer: teacher with method.divergence: cross_entropy
beta alpha: method.beta with method.divergence: jensen_shannon; beta 0 is forward_kl, 1 reverse_kl
kl_type loss_type kd_loss distill_loss divergence_type: method.divergence
clip_range cliprange eps_clip clip_ratio: method.ppo_clip
gamma discount_factor: method.discount
topk top_k_logits distill_topk: method.support_k with method.support: teacher_topk
reward_funcs reward_func reward_function: rewards
output_dir save_path default_local_dir logging_dir: run.dir with run.name
run_name experiment_name exp_name: run.name
save_steps save_freq save_strategy: run.save_every
save_total_limit max_ckpt_num: run.keep
eval_steps test_freq eval_strategy evaluation_strategy: eval.every
eval_on_start val_before_train: eval.start
logging_steps log_every logging_strategy: not needed: every step has its line in metrics.jsonl
report_to logger use_wandb wandb: run.trackers
random_seed data_seed: run.seed
num_threads: run.threads
early_stopping_patience early_stopping: run.stop_after
load_best_model_at_end metric_for_best_model: run.keep_best
resume_from_checkpoint resume resume_mode: not needed: the same command resumes a stopped run
push_to_hub hub_model_id hub_token hub_strategy: not done; hf upload NAME RUN/model does it, with the
  model card that is there
num_processes n_gpus_per_node nproc_per_node n_gpus num_gpus nnodes: not an option: torchrun
  --nproc-per-node N -m onpath train …
"""
"""Their names: our option, or what to do instead."""


_VALUES = """
bf16: bfloat16
fp16 f16 half: float16
fp32 f32 float full: float32
jsd js generalized_jsd gjsd: jensen_shannon
rkl reverse: reverse_kl
fkl forward: forward_kl
opd on_policy on_policy_distillation distillation: opd
gkd: opd with method.divergence: jensen_shannon
minillm: opd with method.divergence: sampled
sft seqkd seq_kd: opd with method.writer: teacher and method.divergence: cross_entropy
fsdp fsdp2 full_shard zero3: layer
tb: tensorboard
"""
"""Values of theirs: ours, where the option takes it."""


def _rows(table: str) -> Iterator[tuple[str, str]]:
    for row in table.replace("\n  ", " ").strip().splitlines():
        names, _, ours = row.partition(": ")
        yield from ((name, ours) for name in names.split())


ELSEWHERE = dict(_rows(_TABLE))
VALUES = dict(_rows(_VALUES))


def answer(key: str) -> str | None:
    """Where a key of another trainer is found here; of a dotted one as many of the last parts count as are
    known.

    >>> answer("training.learning_rate"), answer("actor_rollout_ref.model.path")
    ('here it is optim.lr', 'here it is student.model')
    """
    parts = key.removeprefix("--").replace("-", "_").lower().split(".")
    ours = next((ELSEWHERE[k] for i in range(len(parts)) if (k := ".".join(parts[i:])) in ELSEWHERE), None)
    return ours and (f"it is {ours}" if ours.startswith("not ") else f"here it is {ours}")


def answer_within(key: str, value: object) -> str | None:
    """Of a section of another trainer: where the first of its keys that is known is found here.

    >>> answer_within("trainer", {"device": "cuda", "total_epochs": 3})
    'trainer.total_epochs: here it is optim.steps; an epoch is the number of prompts ÷ rollout.prompts steps'
    """
    if not isinstance(value, Mapping):
        said = answer(key)
        return said and f"{key}: {said}"
    return next(filter(None, (answer_within(f"{key}.{name}", inner) for name, inner in value.items())), None)


def first_answer(keys: Iterable[str]) -> str | None:
    """Of the first key that another trainer has."""
    return next((f"{key}: {said}" for key in keys if (said := answer(key))), None)


def meant(value: object, known: Iterable[str]) -> str:
    """The end of a sentence about a value that is none of those known: what it is here; empty: who knows.

    >>> meant("torch.bf16", ["float32", "bfloat16"])
    '; did you mean bfloat16?'
    """
    if not isinstance(value, str):
        return ""
    word, takes = value.lower().removeprefix("torch.").replace("-", "_"), list(known)
    ours = VALUES.get(word, word)
    if ours.partition(" ")[0] in takes:
        return f"; did you mean {ours}?"
    close = difflib.get_close_matches(word, takes, n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""
