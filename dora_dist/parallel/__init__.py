"""How a model and its work are split over processes, and how these meet and end.

The only room, beside planning's stand-in for it, that uses torch.distributed and DeepSpeed. It knows modules and
parameters, and nothing of DoRA. May import io and below.

process, rendezvous         who this process is among its peers; where they meet, also after a restart
watchdog, orphans, phases   which rank is missing; the end of a process whose launcher died; what a run is doing
shards                      the protocol of a sharding: what a rank holds of a tensor, sums, gathers
replicated, fsdp, zero      the strategies, one file each, which do not know each other
strategy                    which of them a run takes
engine                      one optimizer step (DeepSpeed's is in zero); what the optimizer remembers
deepspeed_config            our settings as DeepSpeed's
gather                      tensors that lie on several ranks, brought together and spread out
"""
