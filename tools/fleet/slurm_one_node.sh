#!/usr/bin/env bash
# A Slurm cluster of one node on this machine, to try configs/launch/slurm.sbatch: as root, after apt-get install slurm-wlm munge.
#   . tools/fleet/slurm_one_node.sh DIR [TASKS_AT_ONCE]      starts it, and sets SLURM_CONF for sbatch, squeue, scontrol
#   kill $(cat DIR/*.pid)                                    ends it
dir=$(realpath -m "${1:?give a folder for its state}")
tasks=${2:-4}
mkdir -p "$dir/state" "$dir/spool"
host=$(hostname -s)
cat > "$dir/slurm.conf" <<CONF
ClusterName=one
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
KillWait=20
MailProg=/bin/true
NodeName=$host NodeAddr=127.0.0.1 CPUs=$tasks State=UNKNOWN
PartitionName=all Nodes=$host Default=YES MaxTime=INFINITE State=UP
CONF
export SLURM_CONF=$dir/slurm.conf
mkdir -p /run/munge && chown munge: /run/munge
pgrep -x munged > /dev/null || runuser -u munge -- /usr/sbin/munged
slurmctld && sleep 2 && slurmd && sleep 2 && sinfo
