package mdns

import (
	"context"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/peerstore"
)

// twoHosts returns two hosts, the one with the smaller id first.
func twoHosts(t *testing.T) (small, large host.Host) {
	t.Helper()
	var hosts [2]host.Host
	for i := range hosts {
		h, err := libp2p.New(libp2p.ListenAddrStrings("/ip4/127.0.0.1/tcp/0"), libp2p.DisableMetrics())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = h.Close() })
		hosts[i] = h
	}
	if hosts[1].ID() < hosts[0].ID() {
		return hosts[1], hosts[0]
	}
	return hosts[0], hosts[1]
}

func infoOf(h host.Host) peer.AddrInfo { return peer.AddrInfo{ID: h.ID(), Addrs: h.Addrs()} }

// TestOnlyTheSmallerIDDials lets two hosts find each other, and one of them while
// too many were found.
func TestOnlyTheSmallerIDDials(t *testing.T) {
	small, large := twoHosts(t)
	newFinder(t.Context(), large).HandlePeerFound(infoOf(small))
	if n := len(large.Network().Conns()); n != 0 {
		t.Errorf("the larger id dialled: %d connections", n)
	}
	full := newFinder(t.Context(), small)
	full.found = make(chan struct{})
	full.HandlePeerFound(infoOf(large))
	if n := len(small.Network().Conns()); n != 0 {
		t.Errorf("dialled over the bound: %d connections", n)
	}
	f := newFinder(t.Context(), small)
	f.HandlePeerFound(infoOf(large))
	f.HandlePeerFound(infoOf(large))
	if n := len(small.Network().Conns()); n != 1 {
		t.Errorf("%d connections, want 1", n)
	}
}

// TestADialThatFailedIsRepeated finds a peer that can be dialled only later: the
// library will not tell of it again.
func TestADialThatFailedIsRepeated(t *testing.T) {
	small, large := twoHosts(t)
	f := newFinder(t.Context(), small)
	f.retry = 20 * time.Millisecond
	time.AfterFunc(100*time.Millisecond, func() {
		small.Peerstore().AddAddrs(large.ID(), large.Addrs(), peerstore.PermanentAddrTTL)
	})
	f.HandlePeerFound(peer.AddrInfo{ID: large.ID()})
	if n := len(small.Network().Conns()); n != 1 {
		t.Errorf("%d connections, want 1", n)
	}
}

// TestItEndsWithItsContext ends the daemon while a found peer does not answer, and
// while no dial is free.
func TestItEndsWithItsContext(t *testing.T) {
	small, large := twoHosts(t)
	ctx, cancel := context.WithCancel(t.Context())
	f := newFinder(ctx, small)
	time.AfterFunc(50*time.Millisecond, cancel)
	f.HandlePeerFound(peer.AddrInfo{ID: large.ID()})
	f.dials = make(chan struct{})
	f.HandlePeerFound(infoOf(large))
	if n := len(small.Network().Conns()); n != 0 {
		t.Errorf("%d connections, want none", n)
	}
}
