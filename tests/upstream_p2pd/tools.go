//go:build tools

// Package upstreamp2pd pins the unmodified p2pd of go-libp2p-daemon, built
// with the dependency versions that its own release states, so that the
// contract suite and a mixed network can run against the stock daemon.
package upstreamp2pd

import (
	_ "github.com/libp2p/go-libp2p-daemon/p2pd"
)
