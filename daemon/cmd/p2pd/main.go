// Command p2pd is the standard go-libp2p-daemon under a main program with safe
// defaults. See the README beside it for what differs from upstream's.
package main

import (
	"os"

	"github.com/lloom/lloom-sidecar/daemon/internal/lifecycle"
)

func main() {
	os.Exit(lifecycle.Main(os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
}
