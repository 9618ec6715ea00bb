package mdns

import (
	"testing"

	"github.com/libp2p/go-libp2p"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/peer"
)

// TestOnlyTheSmallerIDDials lets two hosts find each other, and one of them while
// no dial is free.
func TestOnlyTheSmallerIDDials(t *testing.T) {
	var hosts [2]host.Host
	for i := range hosts {
		h, err := libp2p.New(libp2p.ListenAddrStrings("/ip4/127.0.0.1/tcp/0"), libp2p.DisableMetrics())
		if err != nil {
			t.Fatal(err)
		}
		defer h.Close()
		hosts[i] = h
	}
	small, large := hosts[0], hosts[1]
	if large.ID() < small.ID() {
		small, large = large, small
	}
	find := func(finds, found host.Host, dials chan struct{}) {
		f := &finder{ctx: t.Context(), host: finds, dials: dials}
		f.HandlePeerFound(peer.AddrInfo{ID: found.ID(), Addrs: found.Addrs()})
	}
	find(large, small, make(chan struct{}, maxDials))
	if n := len(large.Network().Conns()); n != 0 {
		t.Errorf("the larger id dialled: %d connections", n)
	}
	find(small, large, make(chan struct{})) // no place for a dial is free
	if n := len(small.Network().Conns()); n != 0 {
		t.Errorf("dialled over the bound: %d connections", n)
	}
	dials := make(chan struct{}, 1)
	find(small, large, dials)
	find(small, large, dials)
	if n := len(small.Network().Conns()); n != 1 {
		t.Errorf("%d connections, want 1", n)
	}
}
