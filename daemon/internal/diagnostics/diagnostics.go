// Package diagnostics serves Prometheus metrics and Go's profiler over HTTP,
// each on a multiplexer of its own, so that the metrics address does not serve
// the profiler too (upstream's main shares one).
package diagnostics

import (
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/pprof"
	"time"

	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/lloom/lloom-sidecar/daemon/internal/fault"
)

// ErrNoPort means that no port of the profiler's range is free.
var ErrNoPort = errors.New("no port from 6060 to 7080 is free")

// Ports among which the profiler looks for a free one, as upstream's does.
const (
	firstPprofPort = 6060
	lastPprofPort  = 7080
)

// headerTimeout ends a connection that never asks anything.
const headerTimeout = 10 * time.Second

// ServeMetrics serves /metrics at addr until the process ends.
func ServeMetrics(addr string) error {
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return fault.New("metrics address (-metricsAddr) "+addr, err, "pass another address")
	}
	mux := http.NewServeMux()
	mux.Handle("/metrics", promhttp.Handler())
	serve(l, mux)
	return nil
}

// ServePprof serves /debug/pprof on localhost until the process ends, on port,
// or on the first free one of the range if port is 0. It returns the address.
func ServePprof(port uint) (string, error) {
	l, err := listenPprof(port)
	if err != nil {
		return "", fault.New("profiler (-pprof)", err, "pass another -pprofPort")
	}
	mux := http.NewServeMux()
	mux.HandleFunc("/debug/pprof/", pprof.Index)
	mux.HandleFunc("/debug/pprof/cmdline", pprof.Cmdline)
	mux.HandleFunc("/debug/pprof/profile", pprof.Profile)
	mux.HandleFunc("/debug/pprof/symbol", pprof.Symbol)
	mux.HandleFunc("/debug/pprof/trace", pprof.Trace)
	serve(l, mux)
	return l.Addr().String(), nil
}

func listenPprof(port uint) (net.Listener, error) {
	if port > 0 {
		return net.Listen("tcp", fmt.Sprintf("localhost:%d", port))
	}
	for p := firstPprofPort; p <= lastPprofPort; p++ {
		if l, err := net.Listen("tcp", fmt.Sprintf("localhost:%d", p)); err == nil {
			return l, nil
		}
	}
	return nil, ErrNoPort
}

func serve(l net.Listener, h http.Handler) {
	server := &http.Server{Handler: h, ReadHeaderTimeout: headerTimeout}
	// Serve only returns when the listener breaks, which ends diagnostics, not the node.
	go func() { _ = server.Serve(l) }()
}
