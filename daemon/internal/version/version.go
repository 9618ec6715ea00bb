// Package version says which build this is.
package version

import (
	"fmt"
	"runtime"
	"runtime/debug"
)

// Number is the release; the linker may set it with -X.
var Number = "0.1.0"

// UserAgent is what identify announces unless -userAgent says otherwise.
func UserAgent() string { return "lloom-p2pd/" + Number }

// String is the line that -version prints: this build and the libraries in it.
func String() string {
	libraries := map[string]string{}
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, d := range info.Deps {
			libraries[d.Path] = d.Version
		}
	}
	return fmt.Sprintf("lloom-p2pd %s (go-libp2p-daemon %s, go-libp2p %s, go-libp2p-pubsub %s, go-libp2p-kad-dht %s, %s)",
		Number,
		libraries["github.com/libp2p/go-libp2p-daemon"],
		libraries["github.com/libp2p/go-libp2p"],
		libraries["github.com/libp2p/go-libp2p-pubsub"],
		libraries["github.com/libp2p/go-libp2p-kad-dht"],
		runtime.Version())
}
