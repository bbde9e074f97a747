// Package other is of another service: its API is not that of stock.
package other
