"""Where runs are started: on TPU VMs, clusters, several processes of this machine, and on paper."""
