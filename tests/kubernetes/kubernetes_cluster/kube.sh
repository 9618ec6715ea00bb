#!/bin/bash
# W=... BIN=... IMG=... kube.sh up | down | <kubectl arguments>: one real node in a network namespace of its own. See cluster.py.
set -u
: "${W:?state folder, made and removed here}" "${BIN:?folder of the kube binaries}"; NS=${NS:-lloomk8s}; IMG=${IMG:?docker save archive, with lloom/pause:dev in it}
P=198.18.20; SVC=198.18.21.0/24; POD=198.18.22.0/24   # RFC 2544 range, exists only inside netns $NS
in_ns(){ nsenter --net=/run/netns/$NS "$@"; }
bg(){ local n=$1; shift; nsenter --net=/run/netns/$NS setsid nohup "$@" >$W/log/$n 2>&1 </dev/null & echo $! >$W/pid/$n; }
kc(){ in_ns $BIN/kubectl --kubeconfig=$W/admin.kubeconfig "$@"; }
wait_for(){ local n=$1 t=$2; shift 2; for i in $(seq $((t*5))); do "$@" >/dev/null 2>&1 && { echo "$n ready +$(( ($(date +%s%N)-T0)/1000000 ))ms"; return 0; }; sleep 0.2; done; echo "$n NOT READY"; tail -5 $W/log/*; return 1; }
up(){
  T0=$(date +%s%N); mkdir -p $W/{log,pid,pki,cni,podlogs,kubelet,etcd}
  ip netns add $NS
  in_ns sh -c "ip link set lo up; ip link add node0 type bridge; ip addr add $P.1/24 dev node0; ip link set node0 up; ip route add default dev node0; echo 1 >/proc/sys/net/ipv4/ip_forward"
  openssl genrsa -out $W/pki/sa.key 2048 2>/dev/null
  TOK=$(openssl rand -hex 16); NTOK=$(openssl rand -hex 16)
  printf '%s,admin,admin,system:masters\n%s,system:node:n1,n1,system:nodes\n' $TOK $NTOK >$W/pki/tokens.csv
  for u in admin:$TOK node:$NTOK; do cat >$W/${u%%:*}.kubeconfig <<K
{apiVersion: v1, kind: Config, clusters: [{name: l, cluster: {server: "https://127.0.0.1:16443", insecure-skip-tls-verify: true}}], users: [{name: u, user: {token: "${u##*:}"}}], contexts: [{name: c, context: {cluster: l, user: u}}], current-context: c}
K
  done
  cat >$W/containerd.toml <<K
version = 2
root = "$W/ctd"
state = "$W/ctd-state"
[grpc]
  address = "$W/ctd.sock"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "docker.io/lloom/pause:dev"
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "$W/cni"
K
  cat >$W/cni/10.conflist <<K
{"cniVersion":"1.0.0","name":"lab","plugins":[{"type":"bridge","bridge":"cni0","isGateway":true,"hairpinMode":true,"ipam":{"type":"host-local","dataDir":"$W/ipam","ranges":[[{"subnet":"$POD"}]],"routes":[{"dst":"0.0.0.0/0"}]}}]}
K
  cat >$W/kubelet.yaml <<K
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
authentication: {anonymous: {enabled: true}, webhook: {enabled: false}}
authorization: {mode: AlwaysAllow}
cgroupDriver: cgroupfs
failSwapOn: false
failCgroupV1: false
oomScoreAdj: 0
containerRuntimeEndpoint: unix://$W/ctd.sock
clusterDNS: [$P.1]
clusterDomain: cluster.local
evictionHard: {memory.available: 100Mi, nodefs.available: 1Gi}
imageGCHighThresholdPercent: 100
imageGCLowThresholdPercent: 99
podLogsDir: $W/podlogs
volumePluginDir: $W/volplugins
K
  cat >$W/kproxy.yaml <<K
apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
mode: nftables
clusterCIDR: $POD
hostnameOverride: n1
clientConnection: {kubeconfig: $W/admin.kubeconfig}
conntrack: {maxPerCore: 0, min: 0, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s}
K
  printf '.:53 {\n errors\n kubernetes cluster.local {\n  kubeconfig %s c\n }\n cache 5\n}\n' $W/admin.kubeconfig >$W/Corefile
  bg etcd etcd --data-dir $W/etcd --unsafe-no-fsync --listen-client-urls http://127.0.0.1:23790 --advertise-client-urls http://127.0.0.1:23790 --listen-peer-urls http://127.0.0.1:23800 --initial-advertise-peer-urls http://127.0.0.1:23800 --initial-cluster default=http://127.0.0.1:23800
  bg containerd containerd -c $W/containerd.toml
  wait_for etcd 20 in_ns curl -sf http://127.0.0.1:23790/health || return 1
  bg apiserver $BIN/kube-apiserver --etcd-servers=http://127.0.0.1:23790 --cert-dir=$W/pki/api --secure-port=16443 --bind-address=127.0.0.1 --advertise-address=$P.1 --service-cluster-ip-range=$SVC --service-account-issuer=https://kubernetes.default.svc --service-account-key-file=$W/pki/sa.key --service-account-signing-key-file=$W/pki/sa.key --token-auth-file=$W/pki/tokens.csv --authorization-mode=Node,RBAC --allow-privileged=true --endpoint-reconciler-type=none --kubelet-preferred-address-types=InternalIP
  wait_for containerd 20 ctr -a $W/ctd.sock version || return 1
  ctr -a $W/ctd.sock -n k8s.io images import $IMG >/dev/null; echo "images +$(( ($(date +%s%N)-T0)/1000000 ))ms"
  wait_for apiserver 60 kc get --raw /readyz || return 1
  bg cm $BIN/kube-controller-manager --kubeconfig=$W/admin.kubeconfig --service-account-private-key-file=$W/pki/sa.key --root-ca-file=$W/pki/api/apiserver.crt --bind-address=127.0.0.1 --leader-elect=false
  bg sched $BIN/kube-scheduler --kubeconfig=$W/admin.kubeconfig --bind-address=127.0.0.1 --leader-elect=false
  bg kubelet $BIN/kubelet --kubeconfig=$W/node.kubeconfig --config=$W/kubelet.yaml --hostname-override=n1 --node-ip=$P.1 --root-dir=$W/kubelet --cert-dir=$W/pki/kubelet
  bg kproxy $BIN/kube-proxy --config=$W/kproxy.yaml
  bg coredns $BIN/coredns -conf $W/Corefile
  wait_for node 60 sh -c "nsenter --net=/run/netns/$NS $BIN/kubectl --kubeconfig=$W/admin.kubeconfig wait --for=condition=Ready node/n1 --timeout=1s"
}
down(){
  for n in kubelet kproxy coredns sched cm apiserver etcd; do [ -f $W/pid/$n ] && kill $(cat $W/pid/$n) 2>/dev/null; done; sleep 1
  ctr -a $W/ctd.sock -n k8s.io task ls -q 2>/dev/null | xargs -r -n1 ctr -a $W/ctd.sock -n k8s.io task rm -f >/dev/null 2>&1
  ctr -a $W/ctd.sock -n k8s.io containers ls -q 2>/dev/null | xargs -r -n1 ctr -a $W/ctd.sock -n k8s.io containers rm >/dev/null 2>&1; sleep 1
  [ -f $W/pid/containerd ] && kill $(cat $W/pid/containerd) 2>/dev/null; sleep 1
  awk -v w="$W/" 'index($2,w)==1{print $2}' /proc/mounts | sort -r | xargs -r -n1 umount
  for n in $(ls /run/netns | grep ^cni-); do [ -z "$(ip netns pids $n 2>/dev/null)" ] && grep -q "$n" $W/log/containerd 2>/dev/null && ip netns del $n; done
  ip netns del $NS; rm -rf $W
}
case $1 in up) up;; down) down;; *) shift 0; kc "$@";; esac
