// Package lib is what the services of the workspace share.
package lib

// Name is what they call themselves.
const Name = "workspace"
