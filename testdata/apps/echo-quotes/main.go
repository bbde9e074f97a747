// Echo-quotes serves quotes with echo, by JSON and as server-sent events.
package main

import (
	"fmt"
	"net/http"
	"os"
	"time"

	"github.com/labstack/echo/v4"
	"github.com/labstack/echo/v4/middleware"
)

var quotes = []string{"Clear is better than clever.", "Errors are values.", "Don't panic."}

func main() {
	e := echo.New()
	e.HideBanner, e.HidePort = true, true
	e.Use(middleware.Recover())
	e.GET("/", func(c echo.Context) error { return c.String(http.StatusOK, "echo-quotes\n") })
	e.GET("/quotes", func(c echo.Context) error { return c.JSON(http.StatusOK, quotes) })
	e.GET("/live", func(c echo.Context) error {
		c.Response().Header().Set("Content-Type", "text/event-stream")
		for _, q := range quotes {
			if _, err := fmt.Fprintf(c.Response(), "data: %s\n\n", q); err != nil {
				return err
			}
			c.Response().Flush()
			select {
			case <-time.After(100 * time.Millisecond):
			case <-c.Request().Context().Done():
				return nil
			}
		}
		return nil
	})
	e.Logger.Fatal(e.Start(addr()))
}

func addr() string {
	if p := os.Getenv("PORT"); p != "" {
		return ":" + p
	}
	return ":8080"
}
