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
	// maxFound bounds the found peers that are dialled or wait to be dialled
	// again; what is found over that is dropped.
	maxFound = 128
	// firstRetry and lastRetry are the first and the longest wait between two
	// dials of a found peer that did not answer.
	firstRetry = 2 * time.Second
	lastRetry  = 64 * time.Second
)

// Start announces h under tag, dials what it finds, and returns what to close.
// An empty tag is libp2p's own.
func Start(ctx context.Context, h host.Host, tag string) (io.Closer, error) {
	s := mdns.NewMdnsService(h, tag, newFinder(ctx, h))
	if err := s.Start(); err != nil {
		_ = s.Close()
		return nil, err
	}
	return s, nil
}

type finder struct {
	ctx   context.Context
	host  host.Host
	found chan struct{}
	dials chan struct{}
	retry time.Duration
}

func newFinder(ctx context.Context, h host.Host) *finder {
	return &finder{
		ctx: ctx, host: h, found: make(chan struct{}, maxFound), dials: make(chan struct{}, maxDials), retry: firstRetry,
	}
}

// HandlePeerFound dials a found peer if this side is the one to dial, until it
// is connected or has not answered for two minutes. The library calls it in a
// goroutine of its own, and once for each peer: it does not tell of it again
// before the announcement's 3,200 s are over, so a dial that failed has to be
// repeated here. One that is lost later is not dialled again: that is decided
// above the daemon, which may have closed it itself.
func (f *finder) HandlePeerFound(found peer.AddrInfo) {
	if !dialsFirst(f.host.ID(), found.ID) {
		return
	}
	select {
	case f.found <- struct{}{}:
		defer func() { <-f.found }()
	default:
		return
	}
	for wait := f.retry; !f.connect(found) && wait <= lastRetry; wait *= 2 {
		select {
		case <-time.After(wait):
		case <-f.ctx.Done():
			return
		}
	}
}

// connect is true when found is connected now.
func (f *finder) connect(found peer.AddrInfo) bool {
	select {
	case f.dials <- struct{}{}:
		defer func() { <-f.dials }()
	case <-f.ctx.Done():
		return false
	}
	if f.host.Network().Connectedness(found.ID) == network.Connected {
		return true
	}
	ctx, cancel := context.WithTimeout(f.ctx, dialTimeout)
	defer cancel()
	// A failed dial needs no word: the peer may be gone, or not let us in.
	return f.host.Connect(ctx, found) == nil
}

// dialsFirst is true for the smaller id: both sides find each other at the same
// moment, and two simultaneous dials make two connections.
func dialsFirst(self, other peer.ID) bool { return self < other }
