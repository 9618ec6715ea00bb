//go:build tools

// Package composeplugin pins Docker's compose plugin and everything it is
// built from, so that the compose test runs with one known version.
package composeplugin

import (
	_ "github.com/docker/compose/v2/cmd"
)
