package config

import (
	"fmt"
	"net"
	"slices"

	"github.com/libp2p/go-libp2p/core/peer"
	ma "github.com/multiformats/go-multiaddr"
	manet "github.com/multiformats/go-multiaddr/net"
)

// check refuses what cannot work or is not safe, a sentence each. Every error
// matches ErrUsage.
func (c *Config) check() error {
	for _, rule := range []func(*Config) error{
		checkSecurity, checkControl, checkAddresses, checkRelay, checkServices, checkNumbers,
	} {
		if err := rule(c); err != nil {
			return err
		}
	}
	return nil
}

func checkSecurity(c *Config) error {
	if c.Security.Plaintext {
		return usage("-plaintext", "unencrypted connections are not supported", "leave it out or pass -plaintext=false")
	}
	if !c.Security.Noise && !c.Security.TLS {
		return usage("-noise and -tls", "at least one channel security protocol must be enabled", "leave one of them on")
	}
	if c.Muxer != "yamux" {
		return usage("-muxer "+c.Muxer, "only yamux is supported (mplex has no flow control and was withdrawn)", "pass -muxer yamux or leave it out")
	}
	return nil
}

func checkControl(c *Config) error {
	first, _ := ma.SplitFirst(c.ListenAddr.Multiaddr)
	if first == nil {
		return usage("-listen", "the address is empty", "pass /unix/<absolute path> or /ip4/127.0.0.1/tcp/<port>")
	}
	if first.Protocol().Code == ma.P_UNIX {
		return nil
	}
	if network, _, err := manet.DialArgs(c.ListenAddr.Multiaddr); err != nil || (network != "tcp4" && network != "tcp6") {
		return usage("-listen "+c.ListenAddr.String(), "the control protocol runs over a unix socket or TCP", "pass /unix/<absolute path> or /ip4/127.0.0.1/tcp/<port>")
	}
	if !manet.IsIPLoopback(c.ListenAddr.Multiaddr) && !c.ControlAllowRemote {
		return usage("-listen "+c.ListenAddr.String(), "whoever reaches the control address owns the node, and this one is not loopback", "use a unix socket or a loopback address, or pass -controlAllowRemote")
	}
	return nil
}

func checkAddresses(c *Config) error {
	for _, a := range c.HostAddresses {
		if !listenable(a) {
			return usage("-hostAddrs "+a.String(), "the host listens on TCP, WebSocket and QUIC v1", "pass for example /ip4/0.0.0.0/tcp/4001 or /ip4/0.0.0.0/udp/4001/quic-v1")
		}
		if c.PSK != "" && usesUDP(a) {
			return usage("-hostAddrs "+a.String(), "a private network (-psk) runs over TCP only", "leave this address out")
		}
	}
	for _, list := range []struct {
		flag  string
		addrs Maddrs
	}{{"-staticRelays", c.StaticRelays}, {"-bootstrapPeers", c.Bootstrap.Peers}} {
		if _, err := peer.AddrInfosFromP2pAddrs(list.addrs...); err != nil {
			return usage(list.flag+" "+list.addrs.String(), err.Error(), "end every address in /p2p/<peer id>")
		}
		for _, a := range list.addrs {
			if _, id := peer.SplitAddr(a); id == "" {
				return usage(list.flag+" "+a.String(), "the address names no peer", "end it in /p2p/<peer id>")
			}
		}
	}
	if c.Bootstrap.Enabled && len(c.Bootstrap.Peers) == 0 {
		return usage("-b", "there is no built-in list of bootstrap peers, this node never joins the public IPFS network by itself", "name peers with -bootstrapPeers or leave -b out")
	}
	return nil
}

// listenable is true for the shapes that the host's transports take. Other
// ones would only fail after the host has logged its own three lines.
func listenable(a ma.Multiaddr) bool {
	var shape []int
	for _, part := range a {
		shape = append(shape, part.Protocol().Code)
	}
	// The zone of a link-local address comes first in a multiaddr.
	if len(shape) > 0 && shape[0] == ma.P_IP6ZONE {
		shape = shape[1:]
	}
	if len(shape) < 2 || (shape[0] != ma.P_IP4 && shape[0] != ma.P_IP6) {
		return false
	}
	for _, known := range [][]int{
		{ma.P_TCP}, {ma.P_TCP, ma.P_WS}, {ma.P_UDP, ma.P_QUIC_V1},
	} {
		if slices.Equal(shape[1:], known) {
			return true
		}
	}
	return false
}

// usesUDP is true for QUIC addresses.
func usesUDP(a ma.Multiaddr) bool {
	_, err := a.ValueForProtocol(ma.P_UDP)
	return err == nil
}

func checkRelay(c *Config) error {
	if c.Relay.Enabled {
		return nil
	}
	for _, need := range []struct {
		on   bool
		flag string
	}{
		{c.Relay.Hop, "-relayHop"}, {c.Relay.Auto, "-autoRelay"},
		{len(c.StaticRelays) > 0, "-staticRelays"}, {c.HolePunch, "-holePunch"},
	} {
		if need.on {
			return usage(need.flag, "it needs the circuit transport, which -relay=false turns off", "leave -relay=false out")
		}
	}
	return nil
}

func checkServices(c *Config) error {
	switch c.DHT.Mode {
	case "", DHTFull, DHTClient, DHTServer:
	default:
		return usage("DHT mode "+c.DHT.Mode, "it is none of full, client, server", "correct the document")
	}
	switch c.ForceReachability {
	case "", ReachabilityPublic, ReachabilityPrivate:
	default:
		return usage("ForceReachability "+c.ForceReachability, "it is neither public nor private", "correct the document")
	}
	if c.PubSub.Enabled && c.PubSub.Router != "gossipsub" && c.PubSub.Router != "floodsub" {
		return usage("-pubsubRouter "+c.PubSub.Router, "it is neither gossipsub nor floodsub", "pass one of them")
	}
	if c.MetricsAddress != "" {
		if _, _, err := net.SplitHostPort(c.MetricsAddress); err != nil {
			return usage("-metricsAddr "+c.MetricsAddress, "it is not host:port", "pass for example 127.0.0.1:9400")
		}
	}
	return nil
}

func checkNumbers(c *Config) error {
	for _, n := range []struct {
		flag         string
		value        int64
		lowest, most int64
	}{
		{"-streamsPerProtocolPeer", int64(c.StreamsPerProtocolPeer), 1, 1 << 20},
		{"-connsPerIP", int64(c.ConnsPerIP), 1, 1 << 20},
		{"-relayMaxCircuits", int64(c.Relay.MaxCircuits), 0, 1 << 20},
		{"-relayMaxReservations", int64(c.Relay.MaxReservations), 0, 1 << 20},
		{"-relayHopLimit", int64(c.Relay.HopLimit), 0, 1 << 20},
		{"-relayLimitData", c.Relay.LimitData, 0, 1 << 50},
		{"-gossipsubDegree", int64(c.PubSub.GossipSubDegree), 0, 1 << 12},
		{"-pprofPort", int64(c.PProf.Port), 0, 65535},
	} {
		if n.value < n.lowest || n.value > n.most {
			return usage(fmt.Sprintf("%s %d", n.flag, n.value), fmt.Sprintf("it is not between %d and %d", n.lowest, n.most), "pass another number")
		}
	}
	m := c.ConnectionManager
	if m.Enabled && (m.LowWaterMark < 0 || m.HighWaterMark < m.LowWaterMark) {
		return usage(fmt.Sprintf("-connLo %d -connHi %d", m.LowWaterMark, m.HighWaterMark), "the low mark must not be negative nor above the high mark", "correct them")
	}
	return nil
}
