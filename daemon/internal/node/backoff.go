package node

import (
	"time"

	"github.com/libp2p/go-libp2p/p2p/net/swarm"
)

// dialBackoffMax bounds how long an address that failed is not dialled again,
// whatever the control socket asks for. libp2p's 5 minutes would keep a node
// away from a validator long after that one is back; what dials in Lloom, the
// sidecar, has a backoff of its own.
const dialBackoffMax = 10 * time.Second

// A package variable of the library, so before the first host exists.
func init() { swarm.BackoffMax = dialBackoffMax }
