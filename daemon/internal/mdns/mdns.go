// Package mdns finds peers on the local link. Finding grants no trust: what a
// found peer may do is decided above the daemon.
package mdns

import (
	"context"
	"io"
	"time"

	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/p2p/discovery/mdns"
)

const (
	// dialTimeout bounds one dial; peers on the link answer in milliseconds.
	dialTimeout = 10 * time.Second
	// maxDials bounds the dials at once: anybody on the link can announce.
	maxDials = 8
)

// Start announces h under tag, dials what it finds, and returns what to close.
// An empty tag is libp2p's own.
func Start(ctx context.Context, h host.Host, tag string) (io.Closer, error) {
	s := mdns.NewMdnsService(h, tag, &finder{ctx: ctx, host: h, dials: make(chan struct{}, maxDials)})
	if err := s.Start(); err != nil {
		_ = s.Close()
		return nil, err
	}
	return s, nil
}

type finder struct {
	ctx   context.Context
	host  host.Host
	dials chan struct{}
}

// HandlePeerFound dials a found peer if this side is the one to dial. The
// library calls it in a goroutine of its own.
func (f *finder) HandlePeerFound(found peer.AddrInfo) {
	if !dialsFirst(f.host.ID(), found.ID) || f.host.Network().Connectedness(found.ID) == network.Connected {
		return
	}
	select {
	case f.dials <- struct{}{}:
		defer func() { <-f.dials }()
	default:
		// A flood of announcements; real peers are announced again.
		return
	}
	ctx, cancel := context.WithTimeout(f.ctx, dialTimeout)
	defer cancel()
	// A failed dial needs no word: the peer may be gone, or not let us in.
	_ = f.host.Connect(ctx, found)
}

// dialsFirst is true for the smaller id: both sides find each other at the same
// moment, and two simultaneous dials make two connections.
func dialsFirst(self, other peer.ID) bool { return self < other }
